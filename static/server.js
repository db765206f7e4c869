// How does the page talk to the server? Requests, errors, and following one job: by events, or by polling where events fail.

const KINDS = ["status", "progress", "preview", "image", "done"];
const POLL_MS = 800;
const AGAIN_MS = 2000;

/** An answer that is not a success; `status` 0 means that there was no answer at all. */
export class ServerError extends Error {
  constructor(status, body, retryAfter) {
    super(body.error || `The server answered ${status}.`);
    this.status = status;
    this.body = body;
    this.retryAfter = retryAfter;
  }
}

/** GET, or POST when there is a body; resolves to the parsed answer, rejects with a ServerError. */
export async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new ServerError(0, { error: "The server does not answer." });
  }
  const parsed = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new ServerError(answer.status, parsed, Number(answer.headers.get("Retry-After")) || 0);
  return parsed;
}

export const jobPath = (id) => `jobs/${encodeURIComponent(id)}/`;

/**
 * Report everything that happens to a job after event number `after` to `on[kind](data)`, and `on.lost()` when the server
 * is gone (it is tried again until it answers), `on.failed(error)` when it knows no such job. Returns a function that stops it.
 */
export function follow(id, after, on) {
  let source = null;
  let timer = 0;
  let stopped = false;
  let misses = 0;

  function stop() {
    stopped = true;
    clearTimeout(timer);
    source?.close();
  }

  function listen() {
    source = new EventSource(`${jobPath(id)}events?after=${after}`);
    for (const kind of KINDS) {
      source.addEventListener(kind, (event) => {
        misses = 0;
        if (kind === "done") stop(); // or the browser would ask for more
        on[kind]?.(JSON.parse(event.data));
      });
    }
    source.onerror = () => {
      misses += 1; // the browser comes back by itself and says what it has seen, unless it was refused
      if (source.readyState === EventSource.CLOSED || misses > 2) {
        source.close();
        poll();
      }
    };
  }

  async function poll() {
    if (stopped) return;
    try {
      const job = await ask(`${jobPath(id)}?include=preview`);
      if (stopped) return;
      on.status?.({ status: job.status, queue_position: job.queue_position, error: job.error });
      const total = job.parameters.n_inf_steps;
      if (job.status === "running") on.progress?.({ t: Math.round(job.progress * total), total_t: total });
      for (const entry of job.response) (job.status === "succeeded" ? on.image : on.preview)?.(entry);
      if (job.finished) {
        stop();
        on.done?.({ status: job.status, error: job.error });
      } else {
        timer = setTimeout(poll, POLL_MS);
      }
    } catch (error) {
      if (stopped) return;
      if (error.status >= 400 && error.status < 500 && error.status !== 429) {
        stop();
        on.failed?.(error);
      } else {
        on.lost?.(error);
        timer = setTimeout(poll, AGAIN_MS);
      }
    }
  }

  listen();
  return stop;
}
