"""Reports of runs: figures, and one page that needs nothing but a browser."""

PAGE = "report.html"  # in a run's folder
