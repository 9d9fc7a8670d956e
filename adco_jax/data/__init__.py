"""Where images come from: sources, order, crop boxes, and two loaders."""
