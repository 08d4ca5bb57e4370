"""Both stages: what they are configured with, and how their runs are built and driven."""
