package images

// artifacts lists every build in the order in which "all" makes them.
func artifacts() []artifact {
	return []artifact{
		{
			name: "debian-python", version: 2, inputs: pythonPackages,
			images: []string{"debian-python"}, build: buildPython,
		},
		{
			name: "debian-scipy", version: 2, inputs: scipyPackages,
			images: []string{"debian-scipy", "one-layer"}, build: buildScipy,
		},
		{name: "torture", version: 3, images: []string{"torture", "torture-odd"}, build: buildTorture},
	}
}
