-- An image is stored without what a camera wrote beside the pixels. Where that changed it, this is what the device
-- announced and will announce again.
ALTER TABLE samples ADD COLUMN announced_sha256 TEXT;
ALTER TABLE samples ADD COLUMN announced_bytes INTEGER;
