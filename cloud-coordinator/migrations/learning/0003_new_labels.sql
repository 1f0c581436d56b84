-- Trainings start by themselves when enough labels are new.
CREATE INDEX labels_by_time ON labels (created_ms);
CREATE INDEX jobs_by_task ON jobs (task, created_ms);

-- Which candidates were judged on which images follows from the models and their snapshots.
DROP TABLE judged;
