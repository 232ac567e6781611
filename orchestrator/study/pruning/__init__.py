"""When a trial is stopped early: pure functions of its learning curve and of the visible trials."""
