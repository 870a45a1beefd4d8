"""The two-tier planner: splits of each request, and closed-form shares of the edge's compute."""
