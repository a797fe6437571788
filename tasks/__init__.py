"""One module per stage of the pipeline: plain functions, and the Prefect tasks that run them."""
