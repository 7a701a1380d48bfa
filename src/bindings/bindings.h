// One init function for each area; module.cpp calls them in order.
#pragma once

#include <nanobind/nanobind.h>

namespace pliant {

void init_errors(nanobind::module_& module);
void init_machine(nanobind::module_& module);
void init_executor(nanobind::module_& module);
void init_sampler(nanobind::module_& module);
void init_tokenizer(nanobind::module_& module);

}  // namespace pliant
