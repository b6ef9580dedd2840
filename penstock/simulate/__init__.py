"""`penstock simulate`: the router's own policies on virtual workers. `command.run` is where it starts."""
