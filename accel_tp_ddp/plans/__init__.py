"""Which module gets which style: rules of the user, this package (`data`) and the model, resolved and verified."""
