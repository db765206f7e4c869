# The server and its workers in one image, with the bundled model inside: docs/scaling.md.
#
#   docker build -t faces .                                                                    for CPUs
#   docker build -t faces-cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
WORKDIR /app
RUN useradd --uid 10001 --create-home faces \
    && mkdir /data .cache \
    && chown faces /data .cache

# the packages first: they change less often than the code
COPY requirements.txt requirements-workers.txt ./
RUN grep -oE '^torch(vision)?==[^ ]+' requirements.txt > torch.txt \
    && python -m pip install --no-cache-dir --only-binary :all: --index-url "${TORCH_INDEX}" -r torch.txt \
    && python -m pip install --no-cache-dir --only-binary :all: -r requirements.txt -r requirements-workers.txt

COPY models ./models
COPY core ./core
COPY static ./static
COPY api.py worker.py model_loading.py generator.py vae.py train_clip.py frontend.html ./

USER 10001
VOLUME /data
EXPOSE 5001
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:5001/health', timeout=4)"]
# without a key (FACES_API_KEY) it does not start: it is open to whoever reaches the port
CMD ["python", "api.py", "--host", "0.0.0.0", "--data-dir", "/data"]
