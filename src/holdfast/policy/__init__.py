"""The model that trains: loaded, made ready, looked after."""
