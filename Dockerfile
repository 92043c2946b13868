# The CPU runtime: samples, inspects and packages exports, without PyTorch.
#
#   docker build --tag lutdeploy .
#   docker run --rm --volume "$PWD/samples:/home/lutdeploy/samples" lutdeploy
#
# User 10001 writes to /home/lutdeploy/samples. The image itself is built by the job "image" of
# .github/workflows/ci.yml, which has not run yet; tests/test_fresh_install.py carries out the first
# stage in a fresh environment. Linted with hadolint.
FROM python:3.12.12-slim-bookworm AS build
ENV PIP_CONSTRAINT=/src/constraints.txt
WORKDIR /src
COPY LICENSE README.md constraints.txt pyproject.toml ./
COPY engines ./engines
COPY lutdeploy ./lutdeploy
COPY training ./training
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /dist .
WORKDIR /opt/home/samples
RUN python -m venv --without-pip /opt/lutdeploy && \
    python -m pip --python /opt/lutdeploy/bin/python install --no-cache-dir /dist/*.whl

FROM python:3.12.12-slim-bookworm
COPY --from=build /opt/lutdeploy /opt/lutdeploy
COPY --from=build --chown=10001:10001 /opt/home /home/lutdeploy
ENV PATH=/opt/lutdeploy/bin:$PATH HOME=/home/lutdeploy
USER 10001:10001
WORKDIR /home/lutdeploy
ENTRYPOINT ["lutdeploy"]
CMD ["sample", "-n", "64", "--out", "samples"]
