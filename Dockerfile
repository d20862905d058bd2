# Two images from one file (docs/images.md):
#   control   for webserver, daemon, code server, and the runs of plans, arrays and checks; no torch
#   worker    for shards: control, and the packages that a shard needs on a GPU
# Build them with `make images`, or:  docker build --platform linux/amd64 --target worker -t census-tf-worker .
#
#   BASE          a Debian whose python3 is 3.11 or 3.12
#   SETS          folder of this checkout to bake as the folder of sets; if you mount sets, you need no new image
#   CHECKPOINTS   folder of this checkout to bake as /opt/census_tf/checkpoints; the default is an empty one
# Pass pip's settings for a registry of your own as the secret `pip.conf`. No layer keeps it.
ARG BASE=debian:bookworm-slim

# --- Python and the user --------------------------------------------------------------------------------------------
# hadolint ignore=DL3006
FROM ${BASE} AS python
# The base decides the versions of these packages.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && apt-get clean && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/census_tf/venv \
    && useradd --uid 1000 --user-group --create-home dagster \
    && install -d -o dagster -g dagster /opt/dagster/dagster_home /var/cache/census-tf
ENV PATH=/opt/census_tf/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# --- The packages that pyproject.toml names, without the source: while these lists stay the same, nothing is reinstalled
FROM python AS requirements
COPY pyproject.toml deploy/images/requirements.py /build/
WORKDIR /build
RUN python3 requirements.py base ui deploy > control.txt && python3 requirements.py worker > worker.txt

FROM python AS control-packages
COPY constraints.txt /opt/census_tf/constraints.txt
COPY --from=requirements /build/control.txt /opt/census_tf/control.txt
# The tests that packages contain are a tenth of this layer.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install -c /opt/census_tf/constraints.txt -r /opt/census_tf/control.txt \
    && find /opt/census_tf/venv -type d -name tests -prune -exec rm -rf {} +

FROM control-packages AS worker-packages
# Triton compiles a part of each GPU kernel's launch when it first runs. It needs a C compiler and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev \
    && apt-get clean && rm -rf /var/lib/apt/lists/*
COPY --from=requirements /build/worker.txt /opt/census_tf/worker.txt
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install -c /opt/census_tf/constraints.txt -r /opt/census_tf/worker.txt
# Upstream's own code, which computes a few cells of each shard again, beside this environment (docs/quality.md).
COPY deploy/upstream.txt /opt/census_tf/upstream.txt
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /opt/upstream \
    && python3 -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
        > "$(/opt/upstream/bin/python3 -c "import sysconfig; print(sysconfig.get_path('purelib'))")/worker.pth" \
    && /opt/upstream/bin/python3 -m pip install --no-deps -r /opt/census_tf/upstream.txt
ENV PATH=$PATH:/opt/upstream/bin

# --- This project, as a wheel ---------------------------------------------------------------------------------------
FROM python AS wheel
COPY constraints.txt /build/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    pip install -c /build/constraints.txt hatchling
COPY pyproject.toml README.md LICENSE /build/
COPY census_tf_dagster /build/census_tf_dagster
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist /build

# --- The images: layers that seldom change come first ----------------------------------------------------------------------
FROM control-packages AS control
ARG CHECKPOINTS=deploy/images/checkpoints
COPY ${CHECKPOINTS} /opt/census_tf/checkpoints
COPY deploy/images/entrypoint deploy/images/healthcheck /opt/dagster/
COPY deploy/ecs/dagster.yaml /opt/dagster/ecs/
ARG SETS=census_tf_dagster/defs
COPY ${SETS} /opt/census_tf/sets
COPY --from=wheel /dist /opt/census_tf/dist
RUN pip install --no-deps --no-index /opt/census_tf/dist/*.whl
ENV DAGSTER_HOME=/opt/dagster/dagster_home \
    CENSUS_TF_SETS=/opt/census_tf/sets \
    CENSUS_TF_CACHE=/var/cache/census-tf \
    NUMBA_CACHE_DIR=/var/cache/census-tf/numba
WORKDIR /opt/dagster
USER 1000:1000
# Declared here, so that an ECS volume without a host path belongs to this user.
VOLUME /var/cache/census-tf
EXPOSE 3000 4000
ENTRYPOINT ["/opt/dagster/entrypoint"]
# The check of the daemon loads the Dagster instance, which takes seconds.
HEALTHCHECK --interval=60s --timeout=30s --start-period=120s CMD ["/opt/dagster/healthcheck"]

# The same last steps on the packages of the worker: a stage cannot have two bases.
FROM worker-packages AS worker
ARG CHECKPOINTS=deploy/images/checkpoints
COPY ${CHECKPOINTS} /opt/census_tf/checkpoints
COPY deploy/images/entrypoint deploy/images/healthcheck /opt/dagster/
COPY deploy/ecs/dagster.yaml /opt/dagster/ecs/
ARG SETS=census_tf_dagster/defs
COPY ${SETS} /opt/census_tf/sets
COPY --from=wheel /dist /opt/census_tf/dist
RUN pip install --no-deps --no-index /opt/census_tf/dist/*.whl
# The platform decides which GPUs a container sees (NVIDIA_VISIBLE_DEVICES). With `all` here, a container that asks for
# none would see every one. NVIDIA_REQUIRE_CUDA: torch is built for CUDA 13.0. With it, a node whose driver is too old
# refuses to start the container, instead of failing its run.
ENV DAGSTER_HOME=/opt/dagster/dagster_home \
    CENSUS_TF_SETS=/opt/census_tf/sets \
    CENSUS_TF_CACHE=/var/cache/census-tf \
    NUMBA_CACHE_DIR=/var/cache/census-tf/numba \
    TRITON_CACHE_DIR=/var/cache/census-tf/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/census-tf/inductor \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_REQUIRE_CUDA=cuda>=13.0
WORKDIR /opt/dagster
USER 1000:1000
VOLUME /var/cache/census-tf
ENTRYPOINT ["/opt/dagster/entrypoint"]
# No health check: a run ends with its process, and Dagster's run monitoring watches it.
HEALTHCHECK NONE
