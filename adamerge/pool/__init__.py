"""Base and experts: checked, and seen as task vectors."""
