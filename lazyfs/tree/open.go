package tree

func open(b []byte) (*Table, error) { return nil, ErrCorrupt }
