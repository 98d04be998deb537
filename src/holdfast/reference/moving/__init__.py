"""References that follow the policy (TR-DPO)."""
