"""How an op is declared, and the checks of arguments that all families share."""
