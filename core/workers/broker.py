"""How is Redis reached, and Celery through it?

One address, or several of Sentinel, which know where the one Redis is that takes writes:
`redis://:password@host:6379/0`, `rediss://` with TLS (`?ssl_ca_certs=FILE` names the authority, `ssl_cert_reqs=none`
checks nothing), `sentinel://host:26379;sentinel://other:26379`. Celery takes the same ones.
https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/redis.html

It does not know what is said (`core/workers/messages.py`).
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import redis
from celery import Celery
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

SCHEMES = ("redis", "rediss", "sentinel")
TIMEOUT_S = 5.0  # of a connection that does not answer
BLOCK_S = 1.0  # of a read that waits for something to come
REDELIVERED_S = 7_200  # Celery's own net: far behind the server, which sends a lost job again within seconds
CERTIFICATES = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}
TASK = "faces.generate"


@dataclass(frozen=True)
class Broker:
    """Where Redis is. `urls` are several with Sentinel only, whose name for the Redis is `master`."""

    urls: tuple[str, ...]
    master: str = "mymaster"

    @classmethod
    def parse(cls, text: str, master: str = "mymaster") -> Broker:
        """The addresses of a flag, with semicolons between them. Raises ValueError, which names the flag."""
        urls = tuple(url.strip() for url in text.split(";") if url.strip())
        schemes = {urlsplit(url).scheme for url in urls}
        if not urls or len(schemes) != 1 or not schemes <= set(SCHEMES) or not all(urlsplit(url).hostname
                                                                                   for url in urls):
            raise ValueError(f"--broker must be redis://HOST:PORT, rediss://HOST:PORT or sentinel://HOST:PORT;..., "
                             f"got {shown(text)}")
        if len(urls) > 1 and schemes != {"sentinel"}:
            raise ValueError(f"--broker takes several addresses of Sentinel only, got {shown(text)}; give one Redis")
        return cls(urls, master)

    @property
    def shown(self) -> str:
        """The addresses without passwords."""
        return shown(";".join(self.urls))

    def connect(self) -> redis.Redis:
        """A client of its own; it connects when it is first used, and again after an error."""
        more: dict[str, Any] = {"socket_timeout": TIMEOUT_S, "socket_connect_timeout": TIMEOUT_S,
                                "retry": Retry(NoBackoff(), 0)}
        first = urlsplit(self.urls[0])
        if first.scheme != "sentinel":
            return redis.Redis.from_url(self.urls[0], **more)
        hosts = [(parts.hostname or "", parts.port or 26379) for parts in map(urlsplit, self.urls)]
        login = {"password": first.password, "username": first.username}
        database = int(first.path.strip("/") or 0)
        return Sentinel(hosts, socket_timeout=TIMEOUT_S).master_for(self.master, db=database, **login, **more)

    def celery(self) -> Celery:
        """Celery as servers and workers use it: no results, no events, a task is acknowledged when it is done."""
        app = Celery("faces", broker=";".join(without_query(url) for url in self.urls), set_as_current=False)
        options = {"visibility_timeout": REDELIVERED_S, "socket_timeout": TIMEOUT_S, "socket_keepalive": True,
                   "socket_connect_timeout": TIMEOUT_S, "master_name": self.master, "global_keyprefix": "faces:celery:"}
        app.conf.update(
            broker_transport_options=options, broker_connection_retry_on_startup=True,
            broker_connection_max_retries=None, broker_connection_timeout=TIMEOUT_S, broker_pool_limit=2,
            task_ignore_result=True, task_acks_late=True, task_reject_on_worker_lost=True, task_publish_retry=False,
            task_serializer="json", accept_content=["json"], worker_prefetch_multiplier=1,
            worker_enable_remote_control=False, worker_send_task_events=False, worker_hijack_root_logger=False,
            worker_enable_prefetch_count_reduction=False, worker_cancel_long_running_tasks_on_connection_loss=False,
        )
        if urlsplit(self.urls[0]).scheme == "rediss":
            app.conf.broker_use_ssl = tls_of(self.urls[0])
        return app


def tls_of(url: str) -> dict[str, Any]:
    """What the query of an address says of TLS, as Celery wants to have it. Certificates are checked unless it says
    otherwise. Raises ValueError for an unknown word."""
    query = {name: values[-1] for name, values in parse_qs(urlsplit(url).query).items()}
    wanted = query.pop("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    if wanted not in CERTIFICATES:
        raise ValueError(f"ssl_cert_reqs of --broker must be one of {', '.join(CERTIFICATES)}, got {wanted}")
    names = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
    return {"ssl_cert_reqs": CERTIFICATES[wanted], **{name: query[name] for name in names if name in query}}


def without_query(url: str) -> str:
    """An address as Celery reads it."""
    return urlunsplit(urlsplit(url)._replace(query=""))


def shown(text: str) -> str:
    """Addresses without their passwords, for messages."""
    urls = []
    for url in text.split(";"):
        parts = urlsplit(url.strip())
        secret = parts.password
        urls.append(url.strip().replace(f":{secret}@", ":***@") if secret else url.strip())
    return ";".join(urls)
