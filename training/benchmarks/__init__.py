"""What the method saves and costs, measured: ours and the obvious way in turn, on the same weights and inputs."""
