"""The rollout server's side of server mode."""
