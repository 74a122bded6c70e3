"""What a run leaves: evaluation, export, reports, and the formats of other libraries."""
