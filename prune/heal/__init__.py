"""Train a cut model back towards the model it was cut from."""
