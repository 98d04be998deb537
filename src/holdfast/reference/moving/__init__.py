"""How a reference moves towards the policy (TR-DPO)."""
