// What rle.cpp, which makes the module, takes from the other files.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

void bind_id_maps(py::module_& m);
void bind_views(py::module_& m);
