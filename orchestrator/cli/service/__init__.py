"""Commands `serve` and `token`: the service and who may use it."""
