package images

// artifacts lists every build in the order in which "all" makes them.
func artifacts() []artifact {
	list := []artifact{
		{
			name: "debian-python", version: 2, inputs: pythonPackages,
			images: []string{"debian-python"}, build: buildPython,
		},
		{
			name: "debian-scipy", version: 2, inputs: scipyPackages,
			images: []string{"debian-scipy", "one-layer"}, build: buildScipy,
		},
		{name: "base", version: 1, inputs: groupInputs(baseGroups), needs: []string{"debian-python"}, build: buildBase},
		{name: "torture", version: 4, images: []string{"torture", "torture-odd"}, build: buildTorture},
		{name: "small", version: 2, images: smallNames(), build: buildSmall},
		{name: "mixed", version: 2, needs: []string{"base"}, images: []string{"mixed"}, build: buildMixed},
		{name: "estargz-50k", version: 2, images: []string{"estargz-50k"}, build: buildManyChunks},
	}
	for _, d := range dialects {
		list = append(list, artifact{name: d.name, version: 1 + d.changes, needs: []string{"base"}, images: []string{d.name}, build: d.build})
	}
	return list
}

// groupInputs is what groups say, as inputs of an artifact.
func groupInputs(groups []group) []string {
	var in []string
	for _, g := range groups {
		in = append(in, g.name)
		in = append(in, g.seeds...)
	}
	return in
}
