"""The method: prompts, clusters, routes, the denoiser and its engine, quality, cost, planner and frameworks."""
