"""The device node: asks for its user's picture, runs its segments, decodes, and reports."""
