"""The only rooms that touch a model: `attach` opens it, a `Run` is the attachment, a `ForwardPass` one call of the model under it."""
