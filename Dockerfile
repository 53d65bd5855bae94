# `worldvla serve` in a container, as an unprivileged user. For the CPU, then for CUDA with NVIDIA's container toolkit:
#   docker build -t worldvla .
#   docker run -p 8000:8000 -e WORLDVLA_API_KEY=SECRET worldvla
#   docker build -t worldvla:cuda --build-arg TORCH=cu130 .
#   docker run --gpus all -p 8000:8000 -e WORLDVLA_API_KEY=SECRET worldvla:cuda tabletop --host 0.0.0.0 --device cuda
FROM python:3.11-slim-bookworm AS base

# EGL lets MuJoCo render without a display: Mesa's on the CPU, the driver's own on a GPU. Debian keeps only the newest
# version of a package, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 worldvla
ENV MUJOCO_GL=egl NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics PYTHONUNBUFFERED=1

# Suffix of PyTorch's wheels: cpu, or a CUDA version such as cu130. Of two equal versions, pip prefers the one with a suffix.
ARG TORCH=cpu

# For .devcontainer/devcontainer.json: the checkout is mounted, and `make` installs from it.
FROM base AS dev
ARG TORCH
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends chromium git make \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/$TORCH
USER 1000

FROM base
ARG TORCH
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY worldvla worldvla
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "https://download.pytorch.org/whl/$TORCH" .

USER 1000
WORKDIR /home/worldvla
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
ENTRYPOINT ["worldvla", "serve"]
CMD ["tabletop", "--host", "0.0.0.0"]
