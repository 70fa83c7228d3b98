"""One file a family, named by its model_type. A leading underscore marks a part of a family, not a family."""
