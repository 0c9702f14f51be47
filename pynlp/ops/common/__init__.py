"""The declaration of ops, and the checks of arguments that all families share."""
