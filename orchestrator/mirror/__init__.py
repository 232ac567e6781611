"""A sweep's copy elsewhere, by URL: checkpoints and final models outlive the machine they were made on."""
