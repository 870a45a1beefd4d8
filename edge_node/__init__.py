"""The edge node: collects requests, plans their routes, runs its segments, and passes latents on."""
