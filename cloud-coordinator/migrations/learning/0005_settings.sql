-- What devices' configurations are to be, as far as they are set from here.

CREATE TABLE settings (
    version    INTEGER NOT NULL PRIMARY KEY,
    digest     TEXT    NOT NULL, -- SHA-256 of the document
    document   TEXT    NOT NULL, -- JSON: whom they are for, and the settings, as they were signed
    trial_s    INTEGER NOT NULL,
    author     TEXT    NOT NULL,
    created_ms INTEGER NOT NULL,
    ended_by   TEXT,             -- who took them back or put others in their place
    ended_ms   INTEGER
);
