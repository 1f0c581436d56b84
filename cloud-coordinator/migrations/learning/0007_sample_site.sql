-- The site of the device that sent the sample, as its certificate says. NULL with origin import, and for what came before
-- devices had certificates: only people who may see all sites see it.
ALTER TABLE samples ADD COLUMN site TEXT;
CREATE INDEX samples_by_site ON samples (site, id);
