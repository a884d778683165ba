# A model behind HTTP on the CPU, from Debian's and PyPI's packages alone:
#   docker build -t segkern .
#   docker run --read-only --tmpfs /tmp -p 8000:8000 -v ./model:/model:ro -e SEGKERN_API_KEY=... segkern
FROM debian:bookworm-slim AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/segkern
ENV PATH=/opt/segkern/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt .
RUN pip install -c constraints.txt "setuptools>=77" torch torchvision pybind11 ninja
COPY . .
RUN SEGKERN_NO_CUDA=1 pip install -c constraints.txt --no-build-isolation ".[serve]" \
    && segkern info

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /tmp --shell /usr/sbin/nologin segkern
COPY --from=build /opt/segkern /opt/segkern
ENV PATH=/opt/segkern/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    GOMP_SPINCOUNT=20000 XDG_CACHE_HOME=/tmp
USER 10001
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["segkern", "serve"]
CMD ["/model", "--host", "0.0.0.0"]
