-- The highest id that was ever given out. Ids are cursors, so that none may come again when retention has taken the rows away.
CREATE TABLE numbered (
    what TEXT    NOT NULL PRIMARY KEY, -- reading | gap
    last INTEGER NOT NULL
);
-- Where the readings are gone already, the last one that was looked at for sightings was at least there.
INSERT INTO numbered (what, last)
SELECT 'reading', coalesce(max(id), 0)
FROM (SELECT max(id) AS id FROM readings UNION ALL SELECT max(reading) FROM sighted) AS ids;
INSERT INTO numbered (what, last)
SELECT 'gap', coalesce(max(id), 0) FROM gaps;
