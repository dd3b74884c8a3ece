"""Many runs: the demo, the study, sweeps and reports."""
