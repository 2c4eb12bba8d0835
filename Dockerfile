# Build: docker build -t tallyman .          with AWS's library, for Amazon MSK with IAM: --build-arg EXTRAS=msk
# Run:   docker run --read-only -v ./config:/tallyman/config:ro -v tallyman:/tallyman/var -e STRIPE_SECRET_KEY tallyman
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
WORKDIR /build
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY consumer consumer
ARG EXTRAS=
# The constraints name every version, also of what builds, so that the same source makes the same image. The environment
# has no pip. Bytecode is made here, for the root file system is read-only where the image runs; it is checked neither
# by times, which would differ from build to build, nor at all.
ENV PIP_CONSTRAINT=/build/constraints.txt PIP_BUILD_CONSTRAINT=/build/constraints.txt PIP_NO_CACHE_DIR=1
RUN python3 -m venv --without-pip /opt/tallyman \
    && python3 -m pip --python /opt/tallyman/bin/python install --no-compile ".${EXTRAS:+[$EXTRAS]}" \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/tallyman/lib

FROM ${BASE}
LABEL org.opencontainers.image.title="Tallyman" \
      org.opencontainers.image.description="Usage events on Kafka become Stripe Meter Events" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/tallyman /opt/tallyman
# The state of storage.kind sqlite lies in var, the configuration in config: these are mounted.
RUN mkdir -p /tallyman/config /tallyman/var && chown 10001:10001 /tallyman/var
WORKDIR /tallyman
VOLUME /tallyman/var
ENV PATH=/opt/tallyman/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HEALTH=http://127.0.0.1:9464/healthz
USER 10001:10001
EXPOSE 9464
# HEALTH is for another http.port. Kubernetes has probes of its own, see helm/.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH'], timeout=4)"]
ENTRYPOINT ["tallyman"]
CMD ["run"]
