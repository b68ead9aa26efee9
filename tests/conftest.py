"""Settings of every test: the same examples each run, and no network."""

import os

import hypothesis

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# Machines differ in speed, so an example has no deadline; derandomised, a failure is the same everywhere.
hypothesis.settings.register_profile("tulle", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("tulle")
