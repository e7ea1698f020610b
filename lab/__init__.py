"""Tools around a run, each started as `python -m lab.NAME`; `python -m lab` lists them."""
