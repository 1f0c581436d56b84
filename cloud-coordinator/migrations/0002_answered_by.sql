-- The neighbour whose model said it; nothing where the device has computed it itself.
ALTER TABLE readings ADD COLUMN answered_by TEXT;
