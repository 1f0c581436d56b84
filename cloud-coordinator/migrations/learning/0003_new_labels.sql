-- Trainings start by themselves when enough labels are new.
CREATE INDEX labels_by_time ON labels (created_ms);
CREATE INDEX jobs_by_task ON jobs (task, created_ms);
