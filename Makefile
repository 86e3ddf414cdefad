# placeholder until the first targets land; see README
build:
	CGO_ENABLED=0 go build -trimpath -o build/muster ./cmd/muster
