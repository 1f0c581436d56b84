-- A device as its neighbours know it: the SHA-256 in its libp2p PeerId. Those that came before get it when they renew.
ALTER TABLE identities ADD COLUMN peer BLOB CHECK (peer IS NULL OR length(peer) = 32);

-- What was last said about who may speak with whom at a site; its version only ever grows.
CREATE TABLE rosters (
    site TEXT PRIMARY KEY,
    version INTEGER NOT NULL,
    members BLOB NOT NULL,           -- SHA-256 of who is on it
    exp INTEGER NOT NULL,            -- until when it holds, in seconds since 1970
    signed TEXT NOT NULL
) STRICT;
