# The server in a container, installed by the command of README.md.
#
#   docker build -t lit-llm .
#   docker run --rm --init --stop-timeout 40 -p 127.0.0.1:8000:8000 -e LIT_LLM_API_KEY=... \
#       -v "$PWD/runs/sft/export:/model:ro" lit-llm
#
# For a GPU: --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04, and `docker run --gpus all`. pip's variables, such as
# PIP_EXTRA_INDEX_URL for smaller builds of torch, are build arguments as well.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ARG PIP_INDEX_URL PIP_EXTRA_INDEX_URL
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# hadolint ignore=DL3008
RUN command -v python3 || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && \
    rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv "$VIRTUAL_ENV"

WORKDIR /opt/lit_llm
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE constraints.txt ./
COPY configs configs
COPY lit_llm lit_llm
COPY serve serve
RUN pip install -c constraints.txt -e .

RUN useradd --create-home server
USER server
EXPOSE 8000
HEALTHCHECK --interval=10s --start-period=60s CMD ["python", "-c", \
    "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/ready', timeout=5)"]
ENTRYPOINT ["python", "-m", "serve", "--host", "0.0.0.0", "--model", "/model"]
